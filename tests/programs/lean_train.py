"""train.py with Lightning imported at the least cost."""

import lean  # noqa: F401  # before all others
from train import main

if __name__ == "__main__":
    main()
