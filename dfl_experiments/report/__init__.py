"""`dfl-report` and `dfl-plot`: tables, figures and an HTML page from run directories."""
