"""The version of the library, stated once."""

VERSION = "0.1.0.dev0"
