"""``python -m snail.experiments`` is the ``snail`` command."""

import sys

from .cli import main

sys.exit(main())
