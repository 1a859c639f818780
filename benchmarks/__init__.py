"""Programs that measure. Figures are kept with machine, date and command, never asserted."""
