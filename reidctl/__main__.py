"""`python -m reidctl`."""

from reidctl.cli.main import main

if __name__ == "__main__":
    main()
