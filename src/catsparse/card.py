"""The README.md that a sparse model's folder gets."""

from __future__ import annotations

from .config import SparsityConfig


def model_card(config: SparsityConfig, merge: bool, adapter: bool) -> str:
    """Markdown: what the folder holds and how it is loaded."""
    base = (config.base_model.name_or_path if config.base_model else "") or "a model of yours"
    code = "import catsparse\n\n"
    if merge:
        code += (
            "from transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        )
    else:
        code += 'model = catsparse.load("path/to/this/folder")\n'
    fine_tuned = "Fine-tuned: a PEFT adapter lies beside. " if adapter else ""
    note = (
        "\nWithout `import catsparse`, transformers warns of an unknown quantization type and "
        "loads the dense model.\n"
        if merge
        else ""
    )
    return (
        f"# {base}, {config.sparsity:.0%} activation-sparse\n\n"
        f"{fine_tuned}Made with [catsparse](https://pypi.org/project/catsparse/) "
        f"{config.catsparse_version}: method {config.described}, "
        f"{config.bytes_skipped:.1%} of {config.weights} weight bytes skipped in decode.\n\n"
        f"```python\n{code}```\n{note}"
    )
