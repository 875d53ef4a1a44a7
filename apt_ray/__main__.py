"""`python -m apt_ray` is `apt-ray`."""

import sys

from apt_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
