"""The mathematics: one public function for each operation checks its input once, then picks an engine."""
