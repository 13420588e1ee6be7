"""``python -m hf_reram``."""

from .cli import main

if __name__ == "__main__":
    main()
