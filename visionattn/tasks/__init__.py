"""Training tasks on Lightning, and what the command line does with them."""
