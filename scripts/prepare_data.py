"""Fetch, check and convert a data set: python scripts/prepare_data.py NAME. See scaling_exps/data/prepare.py."""

from scaling_exps.data.prepare import main

raise SystemExit(main())
