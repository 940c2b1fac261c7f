"""Ideas that train sparse networks, beside pruning trained ones: small studies on models that train here."""
