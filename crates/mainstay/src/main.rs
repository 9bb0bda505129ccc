//! The `mainstay` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Nothing else of this program may have run in the process that parses hostile file systems.
    if std::env::args_os().nth(1).is_some_and(|word| word == mainstay::PARSER) {
        return ExitCode::from(mainstay::parse());
    }
    mainstay::report::explain_panics();
    let status = match mainstay::system::doors() {
        Ok(doors) => mainstay::run(std::env::args_os(), doors),
        Err(error) => mainstay::report::without_doors(&error),
    };
    ExitCode::from(status)
}
