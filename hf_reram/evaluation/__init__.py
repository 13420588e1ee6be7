"""How a model does as chips that age: runs, report, tables, plot, and the layers one by one."""
