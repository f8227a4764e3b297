"""shim"""
from runtime.files import UserError, atomic, disk_errors  # noqa
