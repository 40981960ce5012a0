"""``python -m ruvon`` is ``ruvon``."""

from ruvon.cli import main

if __name__ == "__main__":
    main(prog_name="ruvon")
