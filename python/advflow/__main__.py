"""`python -m advflow` is the `advflow` command."""

from advflow.cli import main

if __name__ == "__main__":
    main()
