"""The door `python -m normbench.train`: one session, or a sweep of them.

Arguments become a plan of sessions (`sweep.py`), each of which is trained (`session.py`) and ends as a row
(`results.py`).
"""

from normbench.cli import run

if __name__ == "__main__":
    run("train")
