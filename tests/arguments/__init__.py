"""Bad arguments for every public function: each is refused with a ValueError or TypeError of ours that says what is needed.

`python -m tests.arguments --count 2000` draws that many sets for each callable and prints what became of them.
"""
