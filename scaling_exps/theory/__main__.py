"""`python -m scaling_exps.theory`."""

import sys

from scaling_exps.theory import main

sys.exit(main())
