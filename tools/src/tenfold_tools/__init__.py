"""The workshop of the tenfold monorepo; see the modules for what each tool does."""
