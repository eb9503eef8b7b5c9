"""The door `python -m normbench.audit`: put layers through the contract, print a card for each."""

from normbench.cli import run

if __name__ == "__main__":
    run("audit")
