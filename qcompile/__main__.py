"""``python -m qcompile``."""

from qcompile.cli import main

if __name__ == "__main__":
    main()
