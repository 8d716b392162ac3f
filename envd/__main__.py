"""`python -m envd` is the `envd` command."""

from .cli import main

if __name__ == "__main__":
    main()
