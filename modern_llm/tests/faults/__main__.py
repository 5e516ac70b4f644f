from modern_llm.tests.faults.table import main

main()
