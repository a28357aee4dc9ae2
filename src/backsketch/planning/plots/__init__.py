"""The figures of a profile and of a ledger."""
