"""``python -m pennyweight.cli``."""

import sys

from pennyweight.cli import main

sys.exit(main())
