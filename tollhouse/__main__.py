"""`python -m tollhouse` is the same as `tollhouse`."""

from tollhouse.main import main

main()
