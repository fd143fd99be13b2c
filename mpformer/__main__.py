import sys

from mpformer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
