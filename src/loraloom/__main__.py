"""`python -m loraloom` is `loraloom`."""

from .cli import main

main()
