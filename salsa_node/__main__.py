"""`python -m salsa_node` is `salsa-node`."""

from salsa_node.cli import main

if __name__ == "__main__":
    main()
