"""The data market: a buyer scores sellers by moments of their data, before anyone shows any.

buyer's rows ─ principal directions ─▶ query ─▶ [ seller: moments along them ] ─▶ response ─▶ scores, ranks, portfolios
"""
