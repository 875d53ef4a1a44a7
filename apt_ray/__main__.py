"""`python -m apt_ray` is `apt-ray`."""

import sys

from apt_ray.cli.main import main

sys.exit(main())
