"""normbench: does this normalization layer change accuracy or time?"""

__version__ = "0.1.0"
