"""The version, where every module may ask for it, in a checkout that is not installed too."""

__version__ = "0.1.0"
