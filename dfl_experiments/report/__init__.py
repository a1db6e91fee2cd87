"""`dfl-report`: tables, figures and a page made from run directories, beside the numbers of the paper."""
