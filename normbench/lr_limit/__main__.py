"""The door `python -m normbench.lr_limit`: the largest learning rate that still trains, per norm."""

from normbench.cli import run

if __name__ == "__main__":
    run("lr_limit")
