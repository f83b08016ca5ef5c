"""From records to tables, plots and one page."""
