"""How the embedded models are made: `python -m relp_cli.models.training [--only NAME]` (`make models`)."""
