"""``catsparse serve`` under load and faults -> rows and a table.

    python benchmarks/load.py [--requests 2000] [--concurrent 200] [--engines batching,sequential]

The bundled model at 50%, fp32, served by a process of its own. Four in five requests are ordinary,
half of them streams; the rest read slowly, leave in the middle of their answer, or are malformed or
too large. Each complete answer must be the greedy text that ``catsparse.generate`` writes, each
refusal the right one. Resident memory is read after a warm-up of as many requests as run at a time,
and again at the end. The figures in docs/serving.md were made by this script.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch

import catsparse
from catsparse import hub
from catsparse.bench.rows import commit, device_name, versions
from catsparse.data import load_windows

RESULTS = Path(__file__).parent / "results" / "load-cpu.jsonl"
BEGINNINGS = ["The captain looked", "Then he said", "She", "It was a dark night, and", "My dear",
              "In the year 1805 the ship", "No one", "The old house stood"]  # fmt: skip
LENGTHS = (16, 32, 64)
KINDS = {"whole": 40, "stream": 40, "slow": 5, "gone": 8, "malformed": 4, "large": 3}
MAX_BODY = 65536
PATH = "/v1/completions"
MALFORMED = [b"{", b"[]", b'{"prompt": 1}', b'{"prompt": "x", "max_tokens": -1}', b"\xff", b""]

Texts = dict[tuple[str, int], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrent", type=int, default=200)
    parser.add_argument("--engines", default="batching")
    parser.add_argument("--work", type=Path, default=Path("out/load"))
    args = parser.parse_args()
    texts = prepare(args.work / "half")
    for engine in args.engines.split(","):
        row = measure(args, engine, texts)
        print(json.dumps(row, indent=2))
        if row["wrong"] or row["failed"] or row["restarts"] or row["exit_code"]:
            raise SystemExit("not every answer was right")
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def prepare(folder: Path) -> Texts:
    """The sparse model's folder, and what it writes."""
    model, tokenizer = (
        hub.load_dense_model("default", dtype=torch.float32),
        hub.load_tokenizer("default"),
    )
    windows = load_windows(hub.bundled_text("calibration"), tokenizer, tokens=65536, seq_len=256)
    catsparse.sparsify(model, catsparse.calibrate(model, windows, progress=False), sparsity=0.5)
    catsparse.save(model, folder)
    texts = {}
    for beginning in BEGINNINGS:
        ids = tokenizer(beginning, return_tensors="pt")["input_ids"]
        for length in LENGTHS:
            written = catsparse.generate(
                model,
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=length,
            )
            new = written[0, ids.shape[1] :]
            texts[beginning, length] = tokenizer.decode(new, skip_special_tokens=True)
    return texts


def measure(args: argparse.Namespace, engine: str, texts: Texts) -> dict[str, Any]:
    options = ["--dtype", "float32", "--port", "0", "--json", "--max-body", str(MAX_BODY)]
    if engine == "sequential":
        options.append("--no-continuous-batching")
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "catsparse.cli", "serve", str(args.work / "half"), *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        ready = time.perf_counter() - start
        first = first_piece(url) - start
        load = Load(url, process.pid, texts, args.concurrent)
        found = asyncio.run(load.run(args.requests))
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
    return {
        "what": "load",
        "impl": engine,
        "device": device_name(torch.device("cpu")),
        "dtype": "float32",
        "name": "default",
        "sparsity": 0.5,
        "requests": args.requests,
        "concurrent": args.concurrent,
        "seconds_to_ready": ready,
        "seconds_to_first_piece": first,
        **found,
        "exit_code": code,
        "versions": versions(),
        "commit": commit(),
    }


def first_piece(url: str) -> float:
    """When a stream's first text came."""
    body = {"messages": [{"role": "user", "content": BEGINNINGS[0]}], "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                return time.perf_counter()
    raise SystemExit("nothing was streamed")


class Load:
    """Requests of all kinds, as many at a time as were asked for."""

    def __init__(self, url: str, pid: int, texts: Texts, concurrent: int) -> None:
        self.url, self.pid, self.texts, self.concurrent = url, pid, texts, concurrent
        self.random = random.Random(0)
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.first: list[float] = []
        self.said: list[str] = []

    async def run(self, requests: int) -> dict[str, Any]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrent)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits) as client:
            await self.all(client, self.concurrent)
            await asyncio.sleep(2)
            alone = await self.alone(client)
            before, tokens = resident(self.pid), await metric(client, "generated_tokens_total")
            self.counts.clear()
            self.seconds.clear()
            self.first.clear()
            start = time.perf_counter()
            rss = []
            for _ in range(4):  # and a look at the memory after each quarter
                await self.all(client, requests // 4)
                rss.append(resident(self.pid))
            took = time.perf_counter() - start
            tokens = await metric(client, "generated_tokens_total") - tokens
            await asyncio.sleep(2)
            restarts = await metric(client, "worker_restarts_total")
            left = await metric(client, "requests_in_flight")
        rss.append(resident(self.pid))
        return {
            "answers_right": self.counts["right"],
            "refusals_right": self.counts["refused"],
            "left_early": self.counts["gone"],
            "wrong": self.counts["wrong"],
            "failed": self.counts["failed"] + int(left),
            "said": self.said[:3],
            "seconds": took,
            "tokens_per_second": tokens / took,
            "alone_tokens_per_second": alone,
            "seconds_p50": quantile(self.seconds, 0.5),
            "seconds_p95": quantile(self.seconds, 0.95),
            "first_token_p50": quantile(self.first, 0.5),
            "rss_before": before,
            "rss": rss,
            "rss_growth": rss[-1] / before - 1,
            "restarts": int(restarts),
        }

    async def alone(self, client: httpx.AsyncClient) -> float:
        """Tokens/s of one stream at a time, after its first token; the middle one of nine."""
        body = {"prompt": BEGINNINGS[0], "max_tokens": 64, "temperature": 0, "stream": True}
        rates = []
        for _ in range(9):
            times = []
            async with client.stream("POST", PATH, json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        times.append(time.perf_counter())
            rates.append(63 / (times[-1] - times[0]))
        return quantile(rates, 0.5)

    async def all(self, client: httpx.AsyncClient, number: int) -> None:
        kinds = self.random.choices(list(KINDS), list(KINDS.values()), k=number)
        places = asyncio.Semaphore(self.concurrent)

        async def one(kind: str) -> None:
            async with places:
                try:
                    outcome = await getattr(self, kind)(client)
                except Exception as error:
                    outcome = "failed"
                    self.said.append(f"{kind}: {type(error).__name__}: {error}"[:200])
                self.counts[outcome] += 1

        await asyncio.gather(*map(one, kinds))

    def pick(self) -> tuple[dict[str, Any], str]:
        (beginning, length), text = self.random.choice(list(self.texts.items()))
        return {"prompt": beginning, "max_tokens": length, "temperature": 0}, text

    def judge(self, kind: str, got: str, text: str) -> str:
        if got != text:
            self.said.append(f"{kind}: {got!r}, not {text!r}"[:300])
        return "right" if got == text else "wrong"

    async def whole(self, client: httpx.AsyncClient) -> str:
        body, text = self.pick()
        start = time.perf_counter()
        response = await client.post(PATH, json=body)
        response.raise_for_status()
        self.seconds.append(time.perf_counter() - start)
        return self.judge("whole", response.json()["choices"][0]["text"], text)

    async def stream(self, client: httpx.AsyncClient) -> str:
        body, text = self.pick()
        start, pieces = time.perf_counter(), []
        async with client.stream("POST", PATH, json=body | {"stream": True}) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    if not pieces:
                        self.first.append(time.perf_counter() - start)
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
        self.seconds.append(time.perf_counter() - start)
        return self.judge("stream", "".join(pieces), text)

    async def slow(self, client: httpx.AsyncClient) -> str:
        """Reads 100 bytes, waits, and so on."""
        body, text = self.pick()
        reader, writer = await self.raw(body)
        parts = []
        while part := await reader.read(100):
            parts.append(part)
            await asyncio.sleep(0.02)
        writer.close()
        lines = b"".join(parts).decode().splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return self.judge("slow", "".join(c["choices"][0]["text"] for c in chunks), text)

    async def gone(self, client: httpx.AsyncClient) -> str:
        """Leaves at once, or after the first bytes."""
        reader, writer = await self.raw(self.pick()[0])
        if self.random.random() < 0.7:
            await reader.read(200)
        writer.transport.abort()
        return "gone"

    async def malformed(self, client: httpx.AsyncClient) -> str:
        raw = self.random.choice(MALFORMED)
        return await self.refused(client, raw, 400)

    async def large(self, client: httpx.AsyncClient) -> str:
        return await self.refused(client, b"x" * (MAX_BODY + 1), 413)

    async def refused(self, client: httpx.AsyncClient, raw: bytes, status: int) -> str:
        headers = {"Content-Type": "application/json"}
        response = await client.post(PATH, content=raw, headers=headers)
        right = response.status_code == status and "message" in response.json()["error"]
        return "refused" if right else "wrong"

    async def raw(self, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        content = json.dumps(body | {"stream": True}).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        await writer.drain()
        return reader, writer


async def metric(client: httpx.AsyncClient, name: str) -> float:
    """Summed over labels."""
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(f"catsparse_{name}"))


def resident(pid: int) -> int:
    """Bytes, of the process."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))] if values else float("nan")


if __name__ == "__main__":
    main()
