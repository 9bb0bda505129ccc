//! The `mainstay` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    mainstay::report::explain_panics();
    let status = match mainstay::system::doors() {
        Ok(doors) => mainstay::run(std::env::args_os(), doors),
        Err(error) => mainstay::report::without_doors(&error),
    };
    ExitCode::from(status)
}
