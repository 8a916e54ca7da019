from benchmarks.evaluate import app

app()
