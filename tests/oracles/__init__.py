"""Independent float64 oracles: the forward pass, the LRP rules and every score, written from the formulas.

`forward.py`  one function, `forward(weights, config, tokens_or_embeddings, rules, patch) -> Trace`
`scores.py`   scores and circuit evaluation from traces alone
`make.py`     tiny random models (all parameters random) and a scope in which Hugging Face computes in true float64
Nothing here imports the package under test.
"""
