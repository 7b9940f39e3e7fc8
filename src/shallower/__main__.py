"""`python -m shallower`, and `accelerate launch -m shallower`."""

from shallower.cli.main import main

main()
