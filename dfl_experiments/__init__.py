"""Direct feedback learning with local alignment support: any method × model × dataset from one entrypoint."""

__version__ = "0.1.0"
