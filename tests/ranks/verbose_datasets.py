"""Lets the datasets library say which of its files it writes and which it reads."""

import datasets

datasets.logging.set_verbosity_info()
