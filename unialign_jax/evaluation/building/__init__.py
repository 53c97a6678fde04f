"""Makes a new set in the form of SemGen-Bench: 150 photographs with four prompts each (arXiv 2509.23760, "New
Evaluation Benchmark"). Each stage has a module; `stages` runs them, `command` is the command line.
"""
