"""The mathematics, each name behind one door that checks its input once and then picks an engine."""
