"""`python -m tcinfer` is the `tcinfer` command."""

from tcinfer.cli import main

if __name__ == "__main__":
    main()
