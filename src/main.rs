//! The `lazy-migrate` command; everything is in the library.

fn main() -> std::process::ExitCode {
    lazy_migrate::cli::main()
}
