"""The command line, as ``python -m backsketch``."""

from backsketch.cli import main

if __name__ == "__main__":
    main()
