"""`python -m deltaclip`."""

from deltaclip.cli import main

if __name__ == "__main__":
    main()
