"""``python -m catsparse.cli``."""

from . import main

main()
