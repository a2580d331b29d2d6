"""The version of the library, said once."""

VERSION = "0.1.0.dev0"
