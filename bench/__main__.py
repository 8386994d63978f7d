import sys

try:
    from bench.cli import main
except ModuleNotFoundError as error:
    if error.name != "rich":
        raise
    sys.exit("python -m bench prints with rich, not installed here: pip install -r requirements/bench.txt")

sys.exit(main())
